"""`mmrm bench`: public reward benchmarks, read from local files and scored with their own metrics."""
