"""The choice of a plan set as a mixed-integer program, solved by HiGHS (the `plan` extra)."""

# HiGHS brings no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import highspy


def best_set_by_highs(
    values: Sequence[Sequence[float]], rows: Sequence[int], num_plans: int, charge: float
) -> list[int]:
    """At most `num_plans` of `rows` whose best value over all situations adds up to most.

    max sum v x - charge sum y,  sum_p x[p, s] = 1,  x[p, s] <= y[p],  sum y <= num_plans,  y binary
    """
    model = highspy.Highs()
    model.setOptionValue("log_to_console", False)
    model.setOptionValue("output_flag", False)
    model.setOptionValue("mip_rel_gap", 1e-9)
    opened = [model.addBinary() for _ in rows]
    total = max(1e-12, *map(sum, values))
    objective = _sum([-charge / total * y for y in opened])
    for s in range(len(values[0])):
        served = [model.addVariable(0.0, 1.0) for _ in rows]
        model.addConstr(_sum(served) == 1.0)
        for x, y, row in zip(served, opened, rows, strict=True):
            model.addConstr(x <= y)
            objective += values[row][s] / total * x
    model.addConstr(_sum(opened) <= num_plans)
    model.maximize(objective)
    return [row for row, y in zip(rows, opened, strict=True) if model.val(y) > 0.5]


def _sum(terms: Sequence[Any]) -> highspy.highs_linear_expression:
    expression = highspy.highs_linear_expression()
    for term in terms:
        expression += term
    return expression
