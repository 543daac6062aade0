"""Judges claims by the rows of a table."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from experiments.harness import marked
from experiments.harness.table import default_decimals, percent, plus_minus

HEAD = ('data', 'claimed to be better', '', 'than', '', 'shown')


class Claim(NamedTuple):
    """The claim that one row of a column is better than another.

    Attributes:
        column: of both rows.
        better, worse: models of the two rows.
        clearly: whether the intervals must not overlap.
    """

    column: str
    better: str
    worse: str
    clearly: bool = False


def judge(claims: Iterable[Claim], rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Judges the claims whose rows were run.

    Args:
        claims: about metrics of which less is better.
        rows: of the table, as in `table_files.rows_of`.

    Returns:
        For each claim: `column`; `better` and `worse`, each with model, metric, mean and interval; `gain`, the
        difference of the means; `shown`, whether the gain is positive; `clear`, whether the intervals do not overlap;
        and `holds`, which is `clear` for claims that demand it, else `shown`.
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
    """Judges whether the rows of a classification that were run are clearly better than the most frequent class.

    The interval of a row with one seed is that of its run's accuracy over the test examples, `±1.96 √(p (1 - p) / n)`
    (Wald's, of a binomial share), which does not cover the variation between seeds.

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
    """Returns half the width of the interval; infinity for a single seed, which has no interval."""
    return math.inf if side['interval'] is None else side['interval']


def _verdict(
    column: str, better: dict[str, Any], worse: dict[str, Any], gain: float, clear: bool, clearly: bool
) -> dict[str, Any]:
    verdict = {'gain': gain, 'shown': gain > 0, 'clear': clear, 'holds': clear if clearly else gain > 0}
    return {'column': column, 'better': better, 'worse': worse, **verdict}


def cells(verdict: dict[str, Any]) -> list[str]:
    """Returns the cells of a verdict below `HEAD`."""
    sides = (text for side in ('better', 'worse') for text in (verdict[side]['model'], _value(verdict[side])))
    return [verdict['column'], *sides, ('clearly' if verdict['clear'] else 'yes') if verdict['shown'] else 'no']


def table(judged: Iterable[dict[str, Any]]) -> str:
    """Returns the verdicts as Markdown."""
    return marked.table(HEAD, map(cells, judged))


def accuracies(judged: Iterable[dict[str, Any]]) -> str:
    """Returns the verdicts of `above_chance` on several columns as Markdown, side by side."""
    columns: dict[str, dict[str, str]] = {}
    for each in judged:
        shown = columns.setdefault(each['column'], {})
        better, chance = (_value(each[side]) for side in ('better', 'worse'))
        shown[each['better']['model']] = better if each['clear'] else f'{better} (not clearly)'
        shown[f'*{each["worse"]["model"]}*'] = f'*{chance}*'
    models = sorted(dict.fromkeys(model for shown in columns.values() for model in shown), key=lambda m: m[0] == '*')
    body = [(model, *(shown.get(model, '') for shown in columns.values())) for model in models]
    return marked.table(['model', *columns], body)


def _value(side: dict[str, Any]) -> str:
    factor = percent(side['metric'])
    text = plus_minus(side, factor, default_decimals(side['metric']))
    return text if factor == 1 else f'{text} %'
