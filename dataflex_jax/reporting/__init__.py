"""What people see of a run: lines, curves, pictures, one page."""
