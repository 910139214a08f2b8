from greeter import greet

print(greet("python"))
