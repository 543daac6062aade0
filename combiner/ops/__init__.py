"""Tools that mechanisms share; they know no mechanism."""
