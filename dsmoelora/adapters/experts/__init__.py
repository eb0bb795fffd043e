"""The experts of a layer: their factors, what they compute, DoRA, how alike they are."""
