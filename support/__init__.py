"""What any training repository needs, whatever its method."""
