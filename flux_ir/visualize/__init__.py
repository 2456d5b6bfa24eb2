"""Pictures of pictures, from a run folder's files alone: no model, no torch."""
