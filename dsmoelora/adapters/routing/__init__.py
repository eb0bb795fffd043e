"""What the routers of a model did: the source of their losses, of selection biases and of their health."""

from dsmoelora.adapters.routing.health import Routing
from dsmoelora.adapters.routing.log import RoutingLog

__all__ = ["Routing", "RoutingLog"]
