package org.example;

/** Says which runtime it found. */
public final class App {
    private App() {}

    public static void main(String[] args) {
        System.out.println("hello from java " + Runtime.version().feature());
    }
}
