"""The rewards of the Countdown settings: an equation that uses each given number once and reaches the target."""

import ast
import operator
import re

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def solved(completions: list[str], target: list[int], nums: list[list[int]], **columns: object) -> list[float]:
    """Return 1 where the last answer uses each of `nums` once and equals `target`, else 0."""
    return [float(_solves(text, goal, given)) for text, goal, given in zip(completions, target, nums, strict=True)]


def answered(completions: list[str], **columns: object) -> list[float]:
    """Return 1 where there is an answer at all, else 0."""
    return [float(_ANSWER.search(text) is not None) for text in completions]


def _solves(text: str, goal: int, given: list[int]) -> bool:
    answers = _ANSWER.findall(text)
    if not answers or len(answers[-1]) > 200:
        return False
    try:
        tree = ast.parse(answers[-1].strip(), mode="eval").body
        used: list[int] = []
        return abs(_value(tree, used) - goal) < 1e-5 and sorted(used) == sorted(given)
    except (ArithmeticError, RecursionError, SyntaxError, ValueError):
        return False


def _value(node: ast.expr, used: list[int]) -> float:
    """Return the value of sums, differences, products and quotients of whole numbers, and note the numbers."""
    match node:
        case ast.Constant(value=int(number)):
            used.append(number)
            return number
        case ast.BinOp(left, operation, right) if type(operation) in _OPERATIONS:
            return _OPERATIONS[type(operation)](_value(left, used), _value(right, used))
        case _:
            raise ValueError(f"not an equation of + - * /: {ast.dump(node)}")
