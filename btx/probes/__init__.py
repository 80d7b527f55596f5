"""One measurement, one file: (model, data) gives numbers and rows per item."""
