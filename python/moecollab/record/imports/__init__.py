"""Reading routing that other programs recorded."""
