"""How good an adapter is: scores on rows of data, the base's beside them, and which experts read right answers."""

from dsmoelora.evaluate.evaluation import Asked, Evaluation
from dsmoelora.evaluate.items import LOADERS, Reading
from dsmoelora.evaluate.routing import remarks_on
from dsmoelora.evaluate.scores import SCORES
from dsmoelora.evaluate.store import Store
from dsmoelora.evaluate.summary import table_of

__all__ = ["LOADERS", "SCORES", "Asked", "Evaluation", "Reading", "Store", "remarks_on", "table_of"]
