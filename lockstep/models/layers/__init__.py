"""Layers shared by the model families, written for one device over packed `[T, D]` rows."""
