"""Data: a table of tasks, the sources behind them, and one pipeline that feeds every one of them."""
