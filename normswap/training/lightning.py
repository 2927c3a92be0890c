"""A callback for Lightning that swaps the norms of a model where it is trained.

    Trainer(callbacks=[SwapNorms("gn-ws")]).fit(module)

Like the one for transformers, it uses normswap as its users do, by its public names.
"""

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:  # the package by its older name
    from pytorch_lightning import Callback  # type: ignore[assignment]

import normswap
from normswap.checkpoints.stored_recipes import recipe_into_metadata, stored_recipe
from normswap.report.report import Report


class SwapNorms(Callback):  # type: ignore[misc]  # Lightning need not be installed
    """Converts the model as its LightningModule is set up: before optimizers are made and checkpoints are loaded.

    Checkpoints hold the recipe: `normswap.load(path, model=factory)` loads them. A run resumes from one (`ckpt_path`)
    with the module and this callback made as they were at first.
    """

    def __init__(self, to: Any, *, module: str = "", fold: bool = False, **options: Any):
        """Takes what to convert to, and how.

        Args:
            to: the target, as for `normswap.convert`.
            module: the path of what is converted in the LightningModule (`net`); "" for all of it.
            fold: leave plain torch layers where possible when the fit is over, after the last checkpoint.
            options: those of `normswap.convert`.
        """
        self.to, self.module, self.fold, self.options = to, module, fold, options
        self.report: Report | None = None
        """Of the conversion, once it is done."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Convert, unless an earlier fit has. Raises as `normswap.convert` does."""
        model = pl_module.get_submodule(self.module)
        if stored_recipe(model) is None:
            self.report = normswap.convert(model, self.to, inplace=True, **self.options).report

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The recipe of a folded model, which puts none into its state dict."""
        state, model = checkpoint["state_dict"], pl_module.get_submodule(self.module)
        recipe_into_metadata(model, state, "", state._metadata.setdefault(self.module, {}))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Fold, if that was asked for."""
        if self.fold:
            normswap.fold(pl_module.get_submodule(self.module), inplace=True)
