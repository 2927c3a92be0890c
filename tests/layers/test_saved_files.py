"""Whole modules that were saved before the code moved into packages load, and give what they gave."""

from pathlib import Path

import torch

import normswap

SAVED = Path(__file__).with_name("saved")


def test_every_layer_of_an_old_file_gives_what_it_gave() -> None:
    from layers.saved.make import outputs

    models = normswap.load(SAVED / "layers.pt")
    wanted = torch.load(SAVED / "outputs.pt")
    found = outputs(models)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # Other versions of torch round otherwise, and a norm over few elements makes that larger.
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_torch_alone_loads_an_old_file() -> None:
    models = torch.load(SAVED / "layers.pt", weights_only=False)
    assert type(models["gn-ws"][0]).__name__ == "StandardizedConv2d"
