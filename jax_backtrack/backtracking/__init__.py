"""The idea, as pure functions: token trees and the losses over them."""
