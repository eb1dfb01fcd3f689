"""Methods: when the support changes, and to what. One final class per paper and file."""
