"""What several foreign layouts share: words of codes, integers and floats in groups, recasting."""
