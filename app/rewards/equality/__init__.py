r"""Whether two answers are equal, strictly: what they say decides, not what a lenient parser can make of them.

| | equal | unlike |
|---|---|---|
| numbers | `0.5`, `1/2`, `\frac12`; `1,234`, `1 234`; `3\frac12`, `7/2`; `1/3`, `0.333333` | `1.6e-19`, `3.2e-19` |
| units | `5`, `5 cm`; `\$7`, `7`; `90^\circ`, `90`; `50\%`, `50` (as MATH grades it) | `5 m`, `5 cm`; `50\%`, `0.5` |
| bases | `2004_5`, `2004_{5}` | `2004_5`, `2004_7`, `2004` |
| words | `\text{east}`, `East`; `\text{(C)}`, `C` | `CAB`, `ABC` |
| order | `\{1, 2\}`, `\{2, 1\}`; `x = 1, y = 2`, `y = 2, x = 1` | `12, 5`, `5, 12`; `(1, 2)`, `[1, 2)` |
| several boxes | `\boxed{2}` and `\boxed{3}`, in any order | one of them |
| names | `x = 5`, `5`; `x \in [1, 2]`, `1 \le x \le 2`, `[1, 2]` | `x = 5`, `y = 5` |
| formulas | `(x+1)^2`, `x^2+2x+1`; `y = 2x + 3`, `2x - y + 3 = 0` | what differs at a point |

Decimals may be rounded: by 1e-6 relative to the reference, and by one unit of the last place that is written. Numbers,
units, words and the structure of lists, intervals, sets and matrices are read here; single formulas by
math-verify's parser, and compared by their values at fixed points. Text and nesting are bounded before they reach that
parser, and magnitudes before they reach sympy: beyond the bounds answers are compared as text.
"""

from app.rewards.equality.comparison import same
from app.rewards.equality.forms import Answer, Group, Named, Quantity, Words
from app.rewards.equality.latex import MAX_LENGTH, is_bounded
from app.rewards.equality.reading import read

__all__ = ["MAX_LENGTH", "Answer", "Group", "Named", "Quantity", "Words", "is_bounded", "read", "same"]
