"""What stands behind a backbone's name: one module for each library."""
