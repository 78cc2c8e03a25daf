"""Programs around the package: the GPU test and bench (``gpu_test``), the documents' tables, type checks."""
