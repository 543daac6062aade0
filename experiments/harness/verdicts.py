"""Whether a table's rows bear out what is claimed of them."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from experiments.harness.table import grid, percent, plus_minus


class Claim(NamedTuple):
    """That one row of a column is better than another.

    Attributes:
        column, better, worse: the column, and the two models.
        clearly: whether it takes intervals that do not meet.
    """

    column: str
    better: str
    worse: str
    clearly: bool = False


def judge(claims: Iterable[Claim], rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the claims shows, of those whose rows were run.

    Args:
        claims: in turn; the less the better.
        rows: of the table, as `table.document` has them.

    Returns:
        For each claim: column; the two sides, each with its model, metric, mean and interval; the `gain` of the better
        one; whether it is `shown` (the gain is one), whether it is `clear` (the intervals do not meet), and whether the
        claim `holds`: the one of these two that it asks for.
    """
    done = {(row['column'], row['model']): _side(row) for row in rows if row['ours']}
    found = []
    for claim in claims:
        better, worse = (done.get((claim.column, model)) for model in (claim.better, claim.worse))
        if better and worse:
            clear = better['mean'] + _half(better) < worse['mean'] - _half(worse)
            found.append(_verdict(claim.column, better, worse, worse['mean'] - better['mean'], clear, claim.clearly))
    return found


def above_chance(rows: Iterable[dict[str, Any]], chance: float) -> list[dict[str, Any]]:
    """Which rows of a classification, of those that were run, are clearly better than the most frequent class.

    The interval of a row with one seed is that of its run's accuracy over the test examples, `±1.96 √(p (1 - p) / n)`
    (Wald's, of a binomial share): it says nothing of other seeds.

    Args:
        rows: as for `judge`.
        chance: share of the most frequent class.

    Returns:
        As `judge`.
    """
    worse = {'model': 'the most frequent class', 'metric': 'accuracy', 'mean': chance, 'interval': None}
    found = []
    for row in rows:
        if row['ours']:
            side = _side(row)
            if side['interval'] is None:
                side['interval'] = 1.96 * math.sqrt(side['mean'] * (1 - side['mean']) / row['runs'][0]['examples'])
            clear = side['mean'] - side['interval'] > chance
            found.append(_verdict(row['column'], side, worse, side['mean'] - chance, clear, clearly=True))
    return found


def _side(row: dict[str, Any]) -> dict[str, Any]:
    values = {name: row['ours'][name] for name in ('mean', 'interval')}
    return {'model': row['model'], 'metric': row['metric'], **values}


def _half(side: dict[str, Any]) -> float:
    """Half the width of the interval, which one seed does not have: it could be anywhere."""
    return math.inf if side['interval'] is None else side['interval']


def _verdict(
    column: str, better: dict[str, Any], worse: dict[str, Any], gain: float, clear: bool, clearly: bool
) -> dict[str, Any]:
    told = {'gain': gain, 'shown': gain > 0, 'clear': clear, 'holds': clear if clearly else gain > 0}
    return {'column': column, 'better': better, 'worse': worse, **told}


def table(judged: Iterable[dict[str, Any]]) -> str:
    """The verdicts as Markdown."""
    body = [
        (
            each['column'],
            *(text for side in ('better', 'worse') for text in (each[side]['model'], _value(each[side]))),
            ('clearly' if each['clear'] else 'yes') if each['shown'] else 'no',
        )
        for each in judged
    ]
    return grid(['data', 'claimed to be better', '', 'than', '', 'shown'], body)


def accuracies(judged: Iterable[dict[str, Any]]) -> str:
    """What `above_chance` says of several columns, side by side as Markdown."""
    columns: dict[str, dict[str, str]] = {}
    for each in judged:
        shown = columns.setdefault(each['column'], {})
        better, chance = (_value(each[side]) for side in ('better', 'worse'))
        shown[each['better']['model']] = better if each['clear'] else f'{better} (not clearly)'
        shown[f'*{each["worse"]["model"]}*'] = f'*{chance}*'
    models = sorted(dict.fromkeys(model for shown in columns.values() for model in shown), key=lambda m: m[0] == '*')
    body = [(model, *(shown.get(model, '') for shown in columns.values())) for model in models]
    return grid(['model', *columns], body)


def _value(side: dict[str, Any]) -> str:
    factor = percent(side['metric'])
    return plus_minus(side, factor, 3) if factor == 1 else f'{plus_minus(side, factor, 1)} %'
