"""The report: one HTML page of all tables, with what their runs left behind.

page       reads the folder and puts the page together
sections   the tables of one table: results, claims, evaluations, costs
curves     drawings whose values can be read, and the line of every mechanism
pictures   samples and attention maps
elements   HTML
"""
