"""What goes on inside a model: attention, distances, similarities, and their figures."""
