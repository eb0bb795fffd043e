"""Contrastive losses over the outputs of the experts of a layer."""

from dsmoelora.adapters.contrastive.losses import ContrastiveLosses, check_head

__all__ = ["ContrastiveLosses", "check_head"]
