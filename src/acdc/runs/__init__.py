"""What recipes need: data, models, the training loop, records and the report."""
