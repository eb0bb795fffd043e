"""Contrastive losses over the outputs of the experts of a layer."""

from dsmoelora.adapters.contrastive.losses import ContrastiveLosses

__all__ = ["ContrastiveLosses"]
