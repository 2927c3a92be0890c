"""Model specs to models: `demo:digits`, `torchvision:NAME`, `timm:NAME`, `package.mod:factory`, `file.py:factory`."""

import ast
import difflib
import importlib
import importlib.util
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from normswap import libraries
from normswap.errors import ModelError, OptionError, first_line

LIBRARIES = ("torchvision", "timm", "demo")
ModelSource = str | nn.Module | Callable[..., nn.Module]
"""What makes a model: a spec, a factory, or the module itself."""


def is_spec(text: str) -> bool:
    """Whether `text` names a model of a library, rather than a file."""
    return text.partition(":")[0] in LIBRARIES


def file_of(text: str) -> str:
    """The file in `file.py:factory`; any other text as it is."""
    origin, _, name = text.rpartition(":")
    return origin if origin.endswith(".py") and name.replace(".", "").isidentifier() else text


def short_name(spec: str) -> str:
    """The model's own name in a spec: `resnet50` of `torchvision:resnet50`."""
    return spec.partition(":")[2].rpartition("/")[2]


def build(spec: str, weights: str | None = None, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The model that `spec` names, in eval mode, with its initial weights, or the published ones that `weights` names.

    Raises `OptionError` for an unknown model, weights or argument, `ModelError` where they cannot be fetched or built.
    """
    library, _, name = spec.partition(":")
    if not name:
        near = _with_colon(spec) or libraries.nearest_spec(spec)
        forms = "write torchvision:NAME, timm:NAME, package.module:factory or file.py:factory"
        raise OptionError(f"{spec!r} is not a model; {f'did you mean {near}?' if near else forms}")
    makers = {"torchvision": _torchvision_maker, "timm": _timm_maker, "demo": _demo_maker}
    if library not in makers and weights is not None:
        raise OptionError(
            f"--weights {weights}: {spec} is not a model of torchvision or timm; load its weights from a file"
        )
    make = makers[library](name, weights) if library in makers else _imported_factory(spec)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of initializations that will change: the weights are random or replaced
            model = make(**(arguments or {}))
    except OSError as error:
        raise ModelError(
            f"{spec}: the weights {weights} cannot be fetched: {error}; check the network, or convert a file"
        ) from error
    except (Exception, SystemExit) as error:  # a factory is anybody's code
        raise ModelError(f"{spec}: cannot be built: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec}: returned a {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def _with_colon(spec: str) -> str | None:
    """`net:Net` for `net.Net`, and `net.py:Net` for `net.py.Net`, where there is such a file; else None."""
    origin, _, name = spec.rpartition(".")
    if name == "py":
        return f"{spec}:make_model" if os.path.isfile(spec) else None
    file = origin if origin.endswith(".py") else f"{origin.replace('.', os.sep)}.py"
    return f"{origin}:{name}" if name.isidentifier() and os.path.isfile(file) else None


def make_model(source: str | Callable[..., nn.Module], arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a spec, or of a factory that is called."""
    if isinstance(source, str):
        return build(source, arguments=arguments)
    model = source(**(arguments or {}))
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model factory returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def parse_arguments(pairs: list[str]) -> dict[str, Any]:
    """`["num_classes=10", "name=x"]` as keyword arguments: Python literals where they are some, else text."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise OptionError(f"--model-arg {pair!r}: write NAME=VALUE, such as num_classes=10")
        try:
            arguments[name] = json.loads(json.dumps(ast.literal_eval(text)))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            arguments[name] = text
    return arguments


# ---- where models come from ----


def _torchvision_maker(name: str, weights: str | None) -> Callable[..., Any]:
    from torchvision import models  # here, since a conversion of a file does not need it

    libraries.check_torchvision_model(name)
    arguments: dict[str, Any] = {"weights": None}
    if weights is not None:
        arguments["weights"] = libraries.torchvision_weights(name, weights)[weights]
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        arguments["weights_backbone"] = None
    return lambda **given: models.get_model(name, **arguments, **given)


def _timm_maker(name: str, weights: str | None) -> Callable[..., Any]:
    timm, full = libraries.timm_model(name, weights)
    return lambda **given: timm.create_model(full, pretrained=weights is not None, **given)


def _demo_maker(name: str, weights: str | None) -> Callable[..., Any]:
    from normswap import demo

    if name != "digits" or weights is not None:
        raise OptionError(f"demo:{name}: there is one demo, demo:digits, with weights of its own")
    return demo.make_network


def _imported_factory(spec: str) -> Callable[..., Any]:
    origin, _, name = spec.rpartition(":")
    module = _module_of_file(Path(origin)) if origin.endswith(".py") else _module_of_package(origin, spec)
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {origin}:{near[0]}?" if near else f"it has {', '.join(names[:8]) or 'none'}"
        raise OptionError(f"{spec}: it has no function {name}; {hint}")
    return found


def _module_of_file(path: Path) -> Any:
    name = path.stem
    described = importlib.util.spec_from_file_location(name, path) if os.path.isfile(path) else None
    if described is None or described.loader is None:
        raise OptionError(f"{path}: no such file; give the file that makes the model, as file.py:function")
    module = importlib.util.module_from_spec(described)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # for what the file imports from beside it
    sys.modules.setdefault(name, module)  # so that classes in it can be pickled
    try:
        described.loader.exec_module(module)
    except SystemExit:
        raise ModelError(
            f"{path}: exits as it is imported; put its main part under if __name__ == '__main__':"
        ) from None
    except Exception as error:  # anybody's code
        raise ModelError(f"{path}: cannot be imported: {first_line(error)}") from error
    finally:
        sys.path.remove(folder)
    return module


def _module_of_package(name: str, spec: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module in the folder where the command runs
    try:
        return importlib.import_module(name)
    except (ImportError, ValueError, TypeError) as error:
        near = libraries.nearest_spec(spec)
        hint = f"did you mean {near}?" if near else "install it, or run in its folder"
        raise OptionError(f"{spec}: {name} cannot be imported ({error}); {hint}") from None
    except (Exception, SystemExit) as error:  # anybody's code
        raise ModelError(f"{spec}: {name} cannot be imported: {first_line(error)}") from error
