"""What measures: what sees images, what compares features, what a training costs, and pictures of the results."""
