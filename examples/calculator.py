"""A pocket calculator as an environment: `model.environment` of `configs/calculator.yaml` names its class."""

import ast
import operator

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
LONGEST = 40


class Calculator:
    """Does one operation at a time, so that a problem takes several turns."""

    def reset(self, **row: object) -> None:
        """Begin a conversation. The prompt says it all, so nothing is added to it."""

    def calc(self, expression: str) -> str:
        """Do one operation on two whole numbers.

        Args:
            expression: the numbers with +, - or * between them, such as 37*48.

        Returns:
            The result.
        """
        if len(expression) > LONGEST:
            raise ValueError("too long")
        match ast.parse(expression.strip(), mode="eval").body:
            case ast.BinOp(left, sign, right) if type(sign) in OPERATIONS:
                return str(OPERATIONS[type(sign)](_number(left), _number(right)))
        raise ValueError("not an operation on two numbers")


def _number(node: ast.expr) -> int:
    match node:
        case ast.Constant(int(value)) if type(value) is int:
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int(value))) if type(value) is int:
            return -value
    raise ValueError("not a whole number")
