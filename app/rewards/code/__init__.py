"""Generated Python code, run against tests in processes without rights."""
