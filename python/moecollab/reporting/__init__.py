"""One page that shows what was found."""
