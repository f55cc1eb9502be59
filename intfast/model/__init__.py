"""The decoder, its files and its optimizer."""
