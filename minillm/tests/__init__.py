"""What a notebook cannot show."""
