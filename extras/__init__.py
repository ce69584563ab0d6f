"""What is convenient, but not on the way from data to images."""
