"""What other programs call: trainers, tracking servers, and servers that run models. Each is imported where it is used."""
