"""What a script of many trials found, like with like."""

from collections import Counter
from collections.abc import Sequence

_MOST, _SHOWN = 40, 300  # kinds of problems that are printed; characters of each


def print_problems(problems: Sequence[str], trials: str) -> bool:
    """Print `problems`, each `which one: what is wrong`, by what is wrong, and their number of `trials`; whether any.

    The commonest come first, each with one that shows it.
    """
    kinds = Counter(problem.partition(": ")[2] for problem in problems)
    for kind, times in kinds.most_common(_MOST):
        example = next(problem for problem in problems if problem.endswith(kind)).partition(": ")[0]
        print(f"{times} × {kind[:_SHOWN]}   such as {example}")
    print(f"{trials}, {len(problems)} problems of {len(kinds)} kinds")
    return bool(problems)
