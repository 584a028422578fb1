"""What lorafx made of a model, told: `explain`, and `print(cm)`."""

from lorafx.explanation.explain_dump import write_beside_dumps as write_beside_dumps
from lorafx.explanation.report import Explanation as Explanation
