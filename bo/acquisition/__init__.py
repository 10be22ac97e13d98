"""What a point is worth: one file a criterion."""
