"""Contrastive losses over the outputs of the experts of a layer."""

from dsmoelora.adapters.contrastive.losses import Contrast, ContrastiveLosses, check_head

__all__ = ["Contrast", "ContrastiveLosses", "check_head"]
