"""How good are a model's features? Simple classifiers on top of them, the model itself frozen."""

PROBES = ("fewshot", "knn", "linear")
