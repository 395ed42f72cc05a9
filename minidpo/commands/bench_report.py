"""How `bench` says its numbers."""

from collections.abc import Sequence

import numpy as np

from minidpo.metrics import say


def spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"q25": float(low), "median": float(middle), "q75": float(high)}


def quartiles(spread: dict[str, float]) -> str:
    return "{median:.3g} ({q25:.3g} to {q75:.3g})".format(**spread)


def tell(title: str, rows: Sequence[tuple[str, float | str]]) -> None:
    say(f"\n{title}")
    for name, value in rows:
        say(
            f"  {name:<52} {value if isinstance(value, str) else f'{value:,.4g}' if value < 1e4 else f'{value:,.0f}'}"
        )
