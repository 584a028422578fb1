"""What lorafx made of a model, told: `explain`, and `print(cm)`."""

from lorafx.explanation.report import Explanation as Explanation
from lorafx.explanation.writing import write_beside_dumps as write_beside_dumps
