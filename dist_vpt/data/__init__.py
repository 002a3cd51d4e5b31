"""From the data section of a recipe to labeled splits and batches. Knows nothing of models or of Accelerate."""
