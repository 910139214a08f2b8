// Package greeting makes greetings.
package greeting

// For greets whoever lives in the named image.
func For(image string) string {
	return "hello from " + image
}
