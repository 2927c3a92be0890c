"""A callback for the Trainer of transformers that swaps the norms of a model where it is trained.

    Trainer(model, args, train_dataset=data, callbacks=[SwapNorms("gn-ws")]).train()

Like the one for Lightning, it uses normswap as its users do, by its public names.
"""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

import normswap
from normswap.checkpoints.stored_recipes import stored_recipe
from normswap.checkpoints.writing import write_recipe_beside
from normswap.report.report import Report


class SwapNorms(TrainerCallback):  # type: ignore[misc]  # transformers need not be installed
    """Converts the model as the Trainer is made, before it makes an optimizer or loads a checkpoint.

    Each checkpoint folder holds the recipe beside the weights: `normswap.load(folder, model=factory)` loads it, and
    `trainer.train(resume_from_checkpoint=True)` resumes, with the model and this callback made as they were at first.
    """

    def __init__(self, to: Any, *, fold: bool = False, **options: Any):
        """Takes a target and options as `normswap.convert` does; `fold`: leave plain layers when training is over."""
        self.to, self.fold, self.options = to, fold, options
        self.report: Report | None = None
        """Of the conversion, once it is done."""

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Convert, unless another Trainer has; an optimizer made before goes on with it."""
        model: nn.Module = given["model"]
        if stored_recipe(model) is None:
            before = dict(model.named_parameters())
            self.report = normswap.convert(model, self.to, inplace=True, **self.options).report
            if given["optimizer"] is not None:
                normswap.remap_optimizer(given["optimizer"], before, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Raise where the callback came too late for `on_init_end`: a checkpoint may have been loaded already."""
        if stored_recipe(given["model"]) is None:
            raise normswap.OptionError("SwapNorms came after the Trainer was made: Trainer(callbacks=[SwapNorms(...)])")

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The recipe beside a checkpoint's weights, which safetensors keep without it."""
        if args.should_save:
            write_recipe_beside(Path(args.output_dir) / f"checkpoint-{state.global_step}", given["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Fold if asked for, and the recipe where `trainer.save_model()` writes."""
        if self.fold:
            normswap.fold(given["model"], inplace=True)
        if args.should_save:
            write_recipe_beside(Path(args.output_dir), given["model"])
