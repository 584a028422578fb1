"""The modelled time of a strategy on a chip."""
