"""Pages, figures and contact sheets; they import nothing else of this package."""
