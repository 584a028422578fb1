"""What lorafx made of a model: `explain`, `why`, and the text of `print(cm)`."""

from lorafx.explanation.collecting import Dumps as Dumps
from lorafx.explanation.report import Explanation as Explanation
