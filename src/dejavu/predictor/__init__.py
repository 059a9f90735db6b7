"""Sparsity packs of a model: data set, predictors, training, calibration."""
