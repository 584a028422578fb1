"""Adapters of other methods than LoRA, read into factors A and B whose product is their ΔW."""
